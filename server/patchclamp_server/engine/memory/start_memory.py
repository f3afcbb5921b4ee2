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
    try:
        # Paths are any bytes. A sandbox may have no such file, or none that may be read.
        smaps = Path("/proc/self/smaps").read_text(errors="surrogateescape")
    except OSError as error:
        logger.info("pages of libraries stay: %s", error)
        return
    for start, end in clean_code(smaps):
        if libc.madvise(start, end - start, _MADV_DONTNEED):
            logger.info("pages of a library stay: errno %d", ctypes.get_errno())
            return


def clean_code(smaps: str) -> Iterator[tuple[int, int]]:
    """Returns the addresses of mappings of libraries that cannot be written and of which no page ever was.

    A page that was written, such as one whose addresses the loader has set, is in no file: to drop it would lose it. It
    is counted as anonymous, or as swapped where the system has put it on a disk.
    """
    start = end = 0
    is_code = False
    written: dict[str, bool] = {}
    # Names of files may have other ends of lines.
    for line in [*smaps.split("\n"), "0-0 ---p 0 0:0 0"]:
        if mapping := _MAPPING.match(line):
            if is_code and "Anonymous" in written and not any(written.values()):
                yield start, end
            start, end = int(mapping["start"], 16), int(mapping["end"], 16)
            is_code = mapping["access"] in ("r-xp", "r--p") and ".so" in Path(mapping["path"]).name
            written = {}
            continue
        name, _, size = line.partition(":")
        if is_code and name in ("Anonymous", "Swap"):
            written[name] = size.split()[0] != "0"
