"""The defects that mutants.py plants in the server: what to write in the place of what, and which tests go red."""

from planted.analysis import ANALYSIS
from planted.cli import CLI
from planted.engine import ENGINE
from planted.interventions import INTERVENTIONS
from planted.model import MODEL
from planted.monitoring import MONITORING
from planted.mutant import Mutant
from planted.neurons import NEURON_METHODS
from planted.rpc import RPC
from planted.sparsity import SPARSITY
from planted.storage import STORAGE

__all__ = ["MUTANTS", "Mutant"]
MUTANTS = (*INTERVENTIONS, *ENGINE, *MODEL, *SPARSITY, *MONITORING, *STORAGE, *ANALYSIS, *NEURON_METHODS, *RPC, *CLI)
