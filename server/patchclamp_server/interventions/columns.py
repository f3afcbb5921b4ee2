"""The format of the tables that programs are written into: kinds of entry, flags, and columns.

patchclamp_kernels.program_table has the same format, and the formula of every kind. It is written down here again
because importing that package needs Triton, which a machine without a GPU need not have; slots.py, which hands the
tables to the kernels, refuses to be imported when the two differ.
"""

from enum import IntEnum, IntFlag


class EntryKind(IntEnum):
    ADD = 0
    PROJECT = 1
    REPLACE = 2
    ROTATE = 3
    LOW_RANK = 4
    NEURONS = 5
    HEADS = 6
    AFFINE = 7
    AFFINE_LOW_RANK = 8
    PATCH = 9
    FEATURES = 10
    CONDITION = 11
    PROJECTION = 12
    NEURON_VALUES = 13
    # No kernel knows these kinds: they need whole rows, and torch's rules read them on every device. Their entries
    # stand behind the range of a slot that kernels run.
    TOP_NEURONS = 32
    LOGIT_LENS = 33
    ACTIVATIONS = 34
    TOP_FEATURES = 35
    LATENT = 36

    @property
    def edits(self) -> bool:
        return self < EntryKind.CONDITION

    @property
    def in_kernels(self) -> bool:
        return self < EntryKind.TOP_NEURONS


class EntryFlag(IntFlag):
    PRESERVE_NORM = 1
    LATCHED = 2
    COSINE = 4
    FEATURE = 8
    INPUT = 16


# Kernels read the first eight columns of whole numbers. Only the host reads the other two: the place, and what orders
# the entries of a place into groups that run as one (see entries.py).
KIND, ITEM, FLAGS, FIRST, COUNT, GATE, LATCH, COLUMN = range(8)
KERNEL_COLUMNS = 8
PLACE, GROUP = 8, 9
INT_COLUMNS = 10
# These are the columns of floats. A condition has its sign in STRENGTH and its threshold in LOW. Conditions and
# readings of a feature have its bias in HIGH and its jump in SPARE.
STRENGTH, LOW, HIGH, SPARE = range(4)
FLOAT_COLUMNS = 4
# These are the columns of units: the neurons, heads, ranks, positions or features of an entry. Features have bias and
# jump in the last two.
FACTOR, OFFSET, UNIT_LOW, UNIT_HIGH = range(4)
BIAS, JUMP = UNIT_LOW, UNIT_HIGH
UNIT, OTHER = range(2)
# Where the mask of a patch stands among its units.
MASK = -1
NO_GATE = -1
