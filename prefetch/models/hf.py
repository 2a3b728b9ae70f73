"""Loading a transformers model and pinning what was loaded. The only file that imports transformers.

It knows no hook and no trace. Heavy libraries are imported inside: a trace that is found needs none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefetch.errors import ConfigError, FormatError
from prefetch.optional import require

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ASKED_BY = "source=huggingface"
# Its router takes the attention mask for a padding mask, which is right only for eager attention's (0 = a real token).
EAGER = frozenset({"nllb_moe"})
CONTENT = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".bin", ".py")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model, and how it is to run."""

    model: str
    revision: str | None = None
    tokenizer: str | None = None  # None = the model's own
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(
                f"dtype: expected auto or one of {sorted(DTYPES)}, got {self.dtype!r}"
            )

    @property
    def name(self) -> str:
        """A hub id as it is; of a folder only its own name, because its place is nobody's business."""
        return Path(self.model).resolve().name if is_local(self.model) else self.model


@dataclass(frozen=True, eq=False)
class LoadedModel:
    name: str
    revision: str | None
    model: Any
    tokenizer: Any

    @property
    def has_encoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def pad(self) -> int:
        """Fills the rows of a batch; masked out, so any token will do."""
        return next((n for n in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if n), 0)


def is_local(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def model_files(model: str) -> dict[str, Path]:
    """The files of a local model whose content decides what it computes."""
    folder = Path(model).expanduser()
    paths = sorted(path for path in folder.iterdir() if path.suffix in CONTENT and path.is_file())
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"source.model={model}: the folder holds no config.json; expected a saved model"
        )
    return {path.name: path for path in paths}


def pinned(repository: str, revision: str | None, *, kind: str = "model") -> str:
    """The commit that a hub id names today; from the local cache where the hub cannot be asked."""
    hub = require("huggingface_hub", "HfApi", asked_by=ASKED_BY)
    if kind == "model" and repository.startswith((".", "/", "~")):
        raise ConfigError(f"source.model={repository}: no such folder")
    try:
        return str(hub.HfApi().repo_info(repository, revision=revision, repo_type=kind).sha)
    except (
        Exception
    ) as asked:  # offline, no such name, no permission: the client has a class for each
        cached = kind == "model" and hub.try_to_load_from_cache(
            repository, "config.json", revision=revision or "main"
        )
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise ConfigError(
            f"{repository}: neither a folder here, nor in the local cache, nor found on the hub "
            f"({_first_line(asked)}); check the name, the network and HF_HUB_OFFLINE, log in if it is gated, or "
            "download it elsewhere and pass its folder"
        ) from None


def load(choice: ModelChoice) -> LoadedModel:
    """The model on its device, in evaluation mode; a checkpoint that lacks weights is refused, not filled at random."""
    transformers = require("transformers", "AutoConfig", "AutoModelForCausalLM", asked_by=ASKED_BY)
    where = f"source.model={choice.model}"
    shared: dict[str, Any] = {
        "trust_remote_code": choice.trust_remote_code,
        "revision": choice.revision,
    }
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(choice.model, **shared)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                choice.tokenizer or choice.model,
                trust_remote_code=choice.trust_remote_code,
                revision=choice.tokenizer_revision if choice.tokenizer else choice.revision,
            )
            model, report = _class_of(transformers, config).from_pretrained(
                choice.model,
                config=config,
                output_loading_info=True,
                **_placement(choice, config),
                **shared,
            )
        except (
            Exception
        ) as error:  # damaged files, unknown architectures: each library has its own classes
            raise FormatError(f"{where}: cannot be loaded ({_first_line(error)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise FormatError(
            f"{where}: the checkpoint lacks {len(missing)} weights ({missing[0]}, ...)"
        )
    if choice.device_map is None:
        model = _moved(model, choice.device)
    revision = getattr(config, "_commit_hash", None) or choice.revision
    return LoadedModel(choice.name, revision, model.eval(), tokenizer)


def _class_of(transformers: Any, config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    causal = transformers.AutoModelForCausalLM
    is_causal = type(config) in causal._model_mapping or hasattr(config, "auto_map")
    return causal if is_causal else transformers.AutoModelForImageTextToText  # run on text alone


def _placement(choice: ModelChoice, config: Any) -> dict[str, Any]:
    import torch

    dtype = DTYPES.get(choice.dtype)
    placement: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto"}
    if config.model_type in EAGER:
        placement["attn_implementation"] = "eager"
    if choice.device_map is not None:
        require("accelerate", asked_by=f"source.device_map={choice.device_map}")
        placement["device_map"] = choice.device_map
    return placement


def _moved(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"source.device={device}: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bars and warnings of transformers; both are given back."""
    log = transformers.utils.logging
    verbosity, has_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bar:
            log.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
