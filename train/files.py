"""Files that are replaced as a whole, so that a process that is killed leaves the old one or the new one."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
