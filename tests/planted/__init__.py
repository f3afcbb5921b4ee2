"""The defects that mutants.py plants in the server: what to write in the place of what, and which tests go red."""

from planted.analysis import ANALYSIS
from planted.calibration import CALIBRATION
from planted.cli import CLI
from planted.directions import DIRECTIONS
from planted.edits import EDITS
from planted.engine import ENGINE
from planted.features import FEATURES
from planted.interventions import INTERVENTIONS
from planted.model import MODEL
from planted.monitoring import MONITORING
from planted.mutant import Mutant
from planted.neurons import NEURON_METHODS
from planted.probes import PROBES
from planted.reading import READING
from planted.rpc import RPC
from planted.sparsity import SPARSITY
from planted.storage import STORAGE

__all__ = ["MUTANTS", "Mutant"]
MUTANTS = (
    *INTERVENTIONS,
    *EDITS,
    *FEATURES,
    *PROBES,
    *ENGINE,
    *MODEL,
    *SPARSITY,
    *MONITORING,
    *STORAGE,
    *ANALYSIS,
    *READING,
    *DIRECTIONS,
    *CALIBRATION,
    *NEURON_METHODS,
    *RPC,
    *CLI,
)
