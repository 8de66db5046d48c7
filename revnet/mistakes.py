"""A user's mistake told from an error of the program, in one line."""

from __future__ import annotations

import difflib
import dis
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import NoReturn

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from revnet.reversible import ReconstructionError

__all__ = ["mistake", "leave"]

PACKAGE = Path(__file__).parent


def leave(config_name: str, line: str, status: int) -> NoReturn:
    """End the command `revnet-CONFIG_NAME` with one line on stderr."""
    print(f"revnet-{config_name}: {line}", file=sys.stderr)
    sys.exit(status)


def mistake(error: BaseException) -> str | None:
    """Tell a user's mistake from an error of the program.

    Mistakes are what Hydra and OmegaConf refuse, values that a configured object refuses with a ValueError or
    TypeError, errors of the file system that name a path, and every ValueError, TypeError or FileNotFoundError that
    this package raises on purpose (by a `raise` statement, in this process or in a data loader's worker).

    Returns:
        One line for the user, or None.
    """
    configured = None
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        configured, error = _target(error), error.__cause__
    line = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"unknown {group} {name!r}; {_valid(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.partition(chr(10))[0]}"
    if isinstance(error, HydraException):
        return (
            _unknown_key(error.__cause__)
            or _unknown_group(line)
            or " ".join(f"{error} {error.__cause__ or ''}".split())
        )
    if isinstance(error, OmegaConfBaseException) or type(error).__name__ == "MisconfigurationException":
        return line
    if isinstance(error, OSError) and error.filename is not None:
        return line
    if isinstance(error, ReconstructionError):
        return (
            f"{line}; or the training diverges: a lower optimizer.lr; callbacks.drift.fall_back_above=0.1 leaves such "
            "steps out and stores from then on"
        )
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        if _raised_on_purpose(error):
            return line
        return _worker_mistake(str(error)) or (configured and f"{configured}: {line}")
    if configured and isinstance(error, ImportError):
        return f"{configured}: {line}"
    return None


def _target(error: InstantiationException) -> str:
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"target '([^']+)'", str(error))
    found = key or target
    return found[1] if found else "configuration"


def _valid(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return "".join([f"did you mean {n!r}? " for n in nearest]) + f"valid: {', '.join(sorted(names))}"


def _unknown_key(cause: BaseException | None) -> str | None:
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(cause.parent_node, DictConfig):
        return None
    names = [str(name) for name in cause.parent_node if name != "hydra" and not str(name).startswith("_")]
    key = str(cause.key)
    if key in names:
        return None
    return f"unknown key {cause.full_key!r}; {_valid(key, names)} (a new key is added by +{cause.full_key}=VALUE)"


def _unknown_group(line: str) -> str | None:
    found = re.match(r"In '(.+)/(.+)': Could not override '(\w+)'\. No match in the defaults list", line)
    if found is None:
        return None
    group, option, missing = found.groups()
    return f"{group}={option} is for another command: it chooses {missing}, a group that this one does not have"


def _raised_on_purpose(error: BaseException) -> bool:
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code: CodeType = traceback.tb_frame.f_code
    instruction = dis.opname[code.co_code[traceback.tb_lasti]]
    return instruction == "RAISE_VARARGS" and Path(code.co_filename).is_relative_to(PACKAGE)


def _worker_mistake(message: str) -> str | None:
    """The mistake in what a data loader says of an error in a worker: a traceback as text, the error at its end."""
    frames = list(re.finditer(r'^  File "(.+)", line \d+, in .+\n +(.+)$', message, re.MULTILINE))
    if not message.startswith("Caught ") or not frames:
        return None
    file, source = frames[-1].groups()
    text = re.search(r"^[\w.]+: (.+)", message[frames[-1].end() :], re.MULTILINE | re.DOTALL)
    if text is None or not source.startswith("raise ") or not Path(file).is_relative_to(PACKAGE):
        return None
    return " ".join(text[1].split())
