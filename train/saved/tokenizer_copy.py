"""The copy of a tokenizer that a run keeps in its folder, so that an export needs no other place."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from dsa_jax.hf.files import CODE_SUFFIXES, COMPANION_FILES, new_folder
from train.data.tokenizing import find_end_token
from train.files import read_json_file

TOKENIZER_FOLDER = "tokenizer"


def keep_tokenizer(path: Path, folder: Path, *, append: bool) -> None:
    """Copies a tokenizer.json and what goes with it into a run's folder, if it is not there.

    Of a file of another name only its `tokenizer_config.json` is taken with it. Where no file names the token that ends
    a document, the copy's `tokenizer_config.json` names the one that training has used.

    Args:
      path: the tokenizer's file.
      folder: the run's.
      append: whether documents end with the tokenizer's end token.

    Raises:
      ValueError: if a settings file is damaged.
      OSError: if a file cannot be read or written.
    """
    target = folder / TOKENIZER_FOLDER
    if (target / "tokenizer.json").is_file() and (target / "tokenizer.json").read_bytes() == path.read_bytes():
        return
    patterns = COMPANION_FILES if path.name == "tokenizer.json" else ("tokenizer_config.json",)
    companions = {file for pattern in patterns for file in path.parent.glob(pattern)}
    end = find_end_token(Tokenizer.from_file(str(path)), path) if append else None
    if target.exists():
        shutil.rmtree(target)
    with new_folder(target) as whole:
        for file in sorted(companions):
            if file.is_file() and file.suffix not in CODE_SUFFIXES:
                shutil.copyfile(file, whole / file.name)
        shutil.copyfile(path, whole / "tokenizer.json")
        settings = whole / "tokenizer_config.json"
        values = read_json_file(settings, "tokenizer_config.json") if settings.exists() else {}
        if end is not None and not values.get("eos_token"):
            settings.write_text(json.dumps(values | {"eos_token": end.token}, indent=2) + "\n")
