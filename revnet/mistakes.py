"""A user's mistake told from an error of the program, in one line."""

from __future__ import annotations

import difflib
import dis
import errno
import inspect
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path
from types import CodeType
from typing import NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from revnet.flows import NonFiniteError
from revnet.processes import rank
from revnet.reversible import ReconstructionError

__all__ = ["KILLED", "mistake", "is_out_of_memory", "leave", "unplaced", "valid"]

PACKAGE = Path(__file__).parent
REFUSALS = (  # of flags, of numbers of processes, of val_check_interval
    "hydra/_internal/utils.py",
    "lightning_fabric/plugins/environments/",
    "pytorch_lightning/loops/fit_loop.py",
)
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/output", "hydra/job_logging", "hydra/hydra_logging")
# Of torch.distributed, where another process does not answer.
LOST = r"DistBackendError|DistNetworkError|DistStoreError|/gloo/"
NO_MEMORY = "can't allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
FULL = (errno.ENOSPC, errno.EDQUOT)
KILLED = "TerminatedWorkerError"  # of joblib, where the system has killed a job
SERVICES = ("wandb", "mlflow")  # whose errors speak of accounts, addresses and files
SECONDS_TO_FIRST = 5  # torchrun ends the others a tenth of a second after one has failed; they start seconds apart


def leave(config_name: str, line: str, status: int) -> NoReturn:
    """End the command `revnet-CONFIG_NAME` with one line on stderr.

    The processes of a distributed run often find the same, and end together when the first has said so.
    """
    number = rank()
    if number > 0:
        time.sleep(SECONDS_TO_FIRST)
    print(f"revnet-{config_name}{f' (process {number})' if number else ''}: {line}", file=sys.stderr)
    sys.exit(status)


def mistake(error: BaseException) -> str | None:
    """Tell a user's mistake from an error of the program.

    Mistakes are what Hydra and OmegaConf refuse, values that a configured object refuses with a ValueError or
    TypeError, a lack of memory, errors of the file system that name a path, a full disk, and every ValueError,
    TypeError, FileNotFoundError or ModuleNotFoundError that this package raises on purpose (by a `raise` statement), in
    this process or in a data loader's worker; so do a few files of Hydra and Lightning (`REFUSALS`). Diverging (a
    reconstruction error or a density that is not finite), the end of another process of a distributed run, and what
    services of logging refuse are told in one line, too.

    Returns:
        One line for the user, or None.
    """
    configured, target = "", ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        configured, target = _where(error)
        error = error.__cause__
    line = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override and not error.override.startswith("~"):
            return f"cannot read {error.override!r}: write KEY=VALUE, such as optimizer.lr=0.05"
        key, _, value = error.override.partition("=")
        remedy = f"quote a text with special characters for Hydra, too: \"{key}='{value}'\""
        return f"cannot read {error.override!r}: {error.message.partition(chr(10))[0]}; {remedy}"
    if isinstance(error, HydraException):
        return (
            _unknown_key(error.__cause__)
            or _unknown_group(line)
            or _chosen_twice(line)
            or " ".join(f"{error} {error.__cause__ or ''}".split())
        )
    if isinstance(error, OmegaConfBaseException) or type(error).__name__ == "MisconfigurationException":
        return line
    if is_out_of_memory(error):
        lines = str(error).strip().split("\n")  # more than one of a loader's process, and of CUDA
        line = next((line for line in lines if re.search(NO_MEMORY, line)), lines[-1])
        return f"out of memory: {line}; give a smaller data.batch_size, or n to revnet-sample"
    if isinstance(error, OSError) and error.filename is not None:
        return line
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{line}: make room where this command writes, or choose another disk"
    if isinstance(error, ReconstructionError):
        return (
            f"{line}; or the training diverges: a lower optimizer.lr; callbacks.drift.fall_back_above=0.1 leaves such "
            "steps out and stores from then on"
        )
    if isinstance(error, NonFiniteError):
        return f"{line}; a training goes on from its last good checkpoint with run_dir=... ckpt_path=last"
    if isinstance(error, ValueError) and line.startswith("Config group override must be a string or a list"):
        return _no_option()
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError)) and _raised_on_purpose(error):
        return line
    if isinstance(error, RuntimeError) and "--ntasks" in line and _raised_on_purpose(error):
        return line
    in_worker = _worker_mistake(error)
    if in_worker is not None:
        return in_worker
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return (configured and _misfit(configured, target, line)) or None
    if isinstance(error, RuntimeError) and re.search(LOST, f"{type(error).__name__} {line}"):
        return f"another process of the run has ended or hangs; go on with run_dir=... ckpt_path=last ({line[:200]})"
    if isinstance(error, RuntimeError) and line.startswith("Early stopping conditioned on metric"):
        return line
    if isinstance(error, RuntimeError) and line.startswith("Found more than one stateful callback"):
        return f"{line} (callbacks.best.save_top_k keeps several of the best checkpoints)"
    if type(error).__name__ == KILLED:
        return "a job was killed, most likely because memory ran out, and with it those beside and behind it"
    if type(error).__module__.partition(".")[0] in SERVICES:
        return line
    if configured and isinstance(error, ImportError):
        return f"{configured}: {_missing_extra(line) or line}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of the CPU, or the system has no more to give."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return known or re.search(NO_MEMORY, str(error)) is not None


def valid(name: str, names: Sequence[str]) -> str:
    """The name that was meant, if one is near, and all that there are."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return "".join([f"did you mean {n!r}? " for n in nearest]) + f"valid: {', '.join(sorted(names))}"


def _where(error: InstantiationException) -> tuple[str, str]:
    """The key in the configuration and the `_target_` (one stands in for the other) of what could not be made."""
    target = re.search(r"target '([^']+)'", str(error))
    key = re.search(r"full_key: (\S+)", str(error)) or target
    return key[1] if key else "configuration", target[1] if target else ""


def _misfit(configured: str, target: str, line: str) -> str:
    """What a configured object says of its arguments, with the nearest name or with what was asked for."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", line)
    if unknown and target:
        nearest = difflib.get_close_matches(unknown[1], inspect.signature(get_object(target)).parameters, n=1)
        return f"{configured}: {line}" + "".join(f"; did you mean {name!r}?" for name in nearest)
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = [override for override in overrides if override.lstrip("+").startswith(f"{configured}.")]
    return f"{configured}: {line}" + (f" (given: {' '.join(given)})" if given else "")


def _missing_extra(line: str) -> str | None:
    """The optional dependency that an ImportError speaks of, and the extra of this package that brings it."""
    for requirement in requires("revnet") or ():
        name, _, marker = requirement.partition(";")
        module = re.split(r"[<>=!~ ]|-skinny", name)[0]
        extra = re.search(r"extra == .(?!dev)(\w+)", marker)
        if extra and re.search(rf"\b{re.escape(module)}\b", line):
            return f"{module} is not installed: pip install 'revnet[{extra[1]}]'"
    return None


def _unknown_option(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    extra = "; joblib and slurm come with pip install 'revnet[sweeps]'" if "launcher" in group else ""
    return f"unknown {group} {name!r}; {valid(name, options)}{extra if 'joblib' not in options else ''}"


def _unknown_key(cause: BaseException | None) -> str | None:
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(cause.parent_node, DictConfig):
        return None
    names = [str(name) for name in cause.parent_node if name != "hydra" and not str(name).startswith("_")]
    key = str(cause.key)
    if key in names:
        return None
    if "/" in key:
        return f"unknown group {key!r}; {valid(key, HYDRA_GROUPS)}"
    deeper = [path for path in _paths(cause.parent_node) if path.endswith(f".{key}")]
    if deeper:
        return f"unknown key {cause.full_key!r}; did you mean {' or '.join(map(repr, deeper))}?"
    known = valid(key, names) if names else f"{str(cause.full_key).rpartition('.')[0]} has no keys"
    return f"unknown key {cause.full_key!r}; {known} (a new key is added by +{cause.full_key}=VALUE)"


def _paths(node: DictConfig, above: str = "") -> Iterator[str]:
    for key in map(str, node):
        child = node._get_node(key)
        if key != "hydra":
            yield f"{above}{key}"
        if isinstance(child, DictConfig) and key != "hydra" and not child._is_none() and not child._is_interpolation():
            yield from _paths(child, f"{above}{key}.")


def _unknown_group(line: str) -> str | None:
    found = re.match(r"In '(.+)/(.+)': Could not override '([\w@./]+)'\.", line)
    if found is None:
        return None
    group, option, missing = found.groups()
    name, _, package = missing.partition("@")
    if group in ("experiment", "debug") and package.startswith(f"{group}."):
        return unplaced(group, option)
    if name.startswith(f"{group}/"):
        wanted = name.removeprefix(f"{group}/")
        return f"{group}={option}: write override /{wanted}, with a slash, in {group}/{option}.yaml"
    if package:
        return None
    return f"{group}={option} is for another command: it chooses {missing}, a group that this one does not have"


def unplaced(group: str, option: str) -> str:
    """What to do about an option whose values would go below the name of its group."""
    return f"{group}={option} changes nothing: begin {group}/{option}.yaml with the line # @package _global_"


def _no_option() -> str:
    """What is wrong where Hydra, which does not say where, met a group that is given null or a number."""
    found = []
    for argument in sys.argv[1:]:
        group, _, option = argument.partition("=")
        options = [file.stem for file in (PACKAGE / "conf" / group).glob("*.yaml")]
        if options and option not in options:
            found.append(f"{argument} names no option; {valid('', options)}")
    return "; ".join(found)


def _chosen_twice(line: str) -> str | None:
    found = re.match(r"Multiple values for ([\w/]+)\.|([\w/]+) appears more than once in the final defaults list", line)
    if found is None:
        return None
    group = found[1] or found[2]
    return f"{group} has an option already: choose another by {group}=OPTION, without the +"


def _raised_on_purpose(error: BaseException) -> bool:
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code: CodeType = traceback.tb_frame.f_code
    instruction = dis.opname[code.co_code[traceback.tb_lasti]]
    file = Path(code.co_filename)
    ours = file.is_relative_to(PACKAGE) or any(refusal in file.as_posix() for refusal in REFUSALS)
    return instruction == "RAISE_VARARGS" and ours


def _worker_mistake(error: BaseException) -> str | None:
    """The mistake in what a data loader says of an error in a worker: a traceback as text, the error at its end."""
    message = str(error)
    frames = list(re.finditer(r'^  File "(.+)", line \d+, in .+\n +(.+)$', message, re.MULTILINE))
    if not isinstance(error, (ValueError, TypeError, OSError)) or not message.startswith("Caught ") or not frames:
        return None
    file, source = frames[-1].groups()
    text = re.search(r"^[\w.]+: (.+)", message[frames[-1].end() :], re.MULTILINE | re.DOTALL)
    if text is None:
        return None
    line = " ".join(text[1].split())
    names_a_path = isinstance(error, OSError) and re.match(r"\[Errno \d+\] [^:]+: '", line)
    on_purpose = source.startswith("raise ") and Path(file).is_relative_to(PACKAGE)
    return line if names_a_path or on_purpose else None
