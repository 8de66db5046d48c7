"""What a run was started with holds again where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import ListConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from revnet.run_directory import PLACE, records

__all__ = ["with_saved_overrides"]


def with_saved_overrides(arguments: list[str]) -> list[str]:
    """Put what a run was started with before the overrides that are to go on with it.

    With `ckpt_path=last` and `run_dir=PATH` among them, the overrides in the newest record of PATH (`.hydra`, or
    `.hydra_N` of a run that was resumed before) come first, so that they hold again, and those given now on top of
    them; its `--config-dir` holds again, too, unless another is given. The checkpoint is that which the run itself was
    to go on from where it has not come to one of its own. Any other arguments are returned as they are.

    Raises:
        ValueError: there is no such record, or the directory is not given.
    """
    if "ckpt_path=last" not in arguments:
        return arguments
    given = [argument for argument in arguments if argument.startswith("run_dir=")]
    if not given:
        raise ValueError("ckpt_path=last goes on with one run, so its directory is needed: run_dir=runs/NAME/DATE")
    parse = OverridesParser.create().parse_override
    directory = Path(str(parse(given[-1]).value()))
    files = {number: record / "overrides.yaml" for number, record in records(directory, ".hydra").items()}
    files = {number: file for number, file in files.items() if file.is_file()}
    if not files:
        raise ValueError(f"{given[-1]}: no run was started there (it has no .hydra/overrides.yaml)")
    record = files[max(files)]
    try:
        loaded: Any = OmegaConf.load(record)
    except YAMLError:
        loaded = None
    if not isinstance(loaded, ListConfig):  # what a full disk or a loss of power leaves is no list
        raise ValueError(f"{record} is empty or damaged: give ckpt_path=PATH, and what the run was started with, anew")
    saved = [str(override) for override in loaded]
    again = {argument.partition("=")[0] for argument in arguments}
    origin = [override for override in saved if override.startswith("ckpt_path=") and parse(override).value()]
    moved = [o for o in (*saved, *arguments) if o.lstrip("+").startswith(f"{PLACE}=") and "${" not in o]
    places = [directory / "checkpoints", *(Path(str(parse(o).value())) for o in moved)]
    if origin and not any(any(place.glob("*.ckpt")) for place in places):
        arguments = [origin[-1] if argument == "ckpt_path=last" else argument for argument in arguments]
    saved = [override for override in saved if override.partition("=")[0] not in again]
    flags = get_args_parser().parse_args(arguments)
    first = arguments.index(flags.overrides[0])  # flags may stand before overrides and behind, not in their midst
    directory_of_configs = [] if flags.config_dir else _config_dir(record.with_name("hydra.yaml"))
    return [*directory_of_configs, *arguments[:first], *saved, *arguments[first:]]


def _config_dir(record: Path) -> list[str]:
    """The flag that a run was started with, or nothing."""
    sources = OmegaConf.load(record).hydra.runtime.config_sources
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
