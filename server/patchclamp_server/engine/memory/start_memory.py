"""What only the start needed is given back when a server is ready.

Reading a tokenizer and a vocabulary leaves holes in the heap, and importing torch and LLVM leaves pages of their code
in the process that nothing runs again. The holes go back to the system, and so do pages of libraries that nobody wrote
to: what is run again comes from the page cache again, in microseconds a page.
"""

import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# The kernel's <asm-generic/mman-common.h>.
_MADV_DONTNEED = 4
_MAPPING = re.compile(r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<access>\S+) \S+ \S+ \d+\s*(?P<path>.*)$")


def give_back_start_memory() -> None:
    """Gives back free heap and clean pages of library code. Does nothing where the system has no such calls."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Not every libc has it.
    if trim := getattr(libc, "malloc_trim", None):
        trim(0)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in clean_code(Path("/proc/self/smaps").read_text()):
        if libc.madvise(start, end - start, _MADV_DONTNEED):
            logger.info("pages of a library stay: errno %d", ctypes.get_errno())
            return


def clean_code(smaps: str) -> Iterator[tuple[int, int]]:
    """Returns the addresses of mappings of libraries that cannot be written and of which no page ever was.

    A page that was written, such as one whose addresses the loader has set, is in no file: to drop it would lose it.
    """
    start = end = 0
    is_code = False
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            start, end = int(mapping["start"], 16), int(mapping["end"], 16)
            is_code = mapping["access"] in ("r-xp", "r--p") and ".so" in Path(mapping["path"]).name
        elif is_code and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
            yield start, end
