"""Loading a causal language model, and putting a LoRA adapter on it."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.errors import ConfigError, ModelError, is_out_of_memory
from gradpursuit.hub import hub_can_be_asked
from gradpursuit.trajectory.expressions import check_time, repeats

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("gradpursuit")
_WRAPPERS = frozenset(("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"))
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")


@dataclass(frozen=True)
class Compute:
    """Where and how forward and backward passes are computed; `autocast` is None for plain float32."""

    device: torch.device
    autocast: torch.dtype | None

    @classmethod
    def of(cls, config: ModelSection) -> Compute:
        """Resolve `model.device` and `model.precision` on this machine.

        Raises:
            ConfigError: the device does not exist here.
        """
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0][:200]
            raise ConfigError(f"model.device '{config.device}' cannot be used here: {reason}") from None
        if device.type == "meta":
            raise ConfigError(f"model.device '{config.device}': it holds no numbers; give auto, cpu or cuda")
        if device.index:
            raise ConfigError(
                f"model.device '{config.device}': training uses the first visible GPU; set CUDA_VISIBLE_DEVICES="
                f"{device.index} and give model.device: cuda"
            )
        if config.precision == "float32":
            return cls(device, None)
        if config.precision == "bfloat16" or _fast_bfloat16(device):
            return cls(device, torch.bfloat16)
        return cls(device, None)

    def precision(self) -> torch.autocast:
        """A context in which a model computes with the precision asked for."""
        dtype = self.autocast
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {'bfloat16 autocast' if self.autocast else 'float32'}"


def load_tokenizer(config: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `model.path`.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    from transformers import AutoTokenizer

    name, options = _source(config)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:  # transformers and its back ends raise many kinds for one broken folder
        raise ModelError(f"model.path '{config.path}': no usable tokenizer: {_why(config, options, error)}") from error
    return tokenizer


def load_config(config: ModelSection) -> Any:
    """The model's settings, without its weights.

    Raises:
        ModelError: they are not there or cannot be read.
    """
    from transformers import AutoConfig

    name, options = _source(config)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # as above
        raise ModelError(f"model.path '{config.path}': cannot be loaded: {_why(config, options, error)}") from error


def load_model(config: ModelSection) -> PreTrainedModel:
    """The base model, float32, on the CPU, frozen and in evaluation mode.

    A GGUF file is dequantized into a plain float32 model of the same architecture.

    Raises:
        ModelError: it is not there, is not a causal language model, or has no linear layers.
    """
    from transformers import AutoModelForCausalLM

    name, options = _source(config)
    if Compute.of(config).device.type == "cpu":
        # The fused attention's backward pass in bfloat16 is ten times slower on a CPU than the plain one.
        options["attn_implementation"] = "eager"
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:  # as above
        raise ModelError(f"model.path '{config.path}': cannot be loaded: {_why(config, options, error)}") from error
    if "gguf_file" in options:
        model = _plain_copy(model)
    model.requires_grad_(False)
    model.eval()
    return model


def attach_lora(model: PreTrainedModel, config: LoraSection, seed: int) -> PeftModel:
    """A fresh adapter on `model` (which is changed in place), initialised from `seed`, without dropout.

    Raises:
        ModelError: the model has no layers that `model.lora.target_modules` matches.
    """
    from peft import LoraConfig

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=config.target_modules,
        use_rslora=config.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return attach_peft(model, lora, seed, f"model.lora.target_modules={config.target_modules!r}")


def attach_peft(model: PreTrainedModel, lora: LoraConfig, seed: int, origin: str) -> PeftModel:
    """As :func:`attach_lora`, with the settings that `peft` itself uses; `origin` names them in messages."""
    from peft import get_peft_model

    check_time(_expressions(lora), [name for name, _ in model.named_modules()], origin)
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, lora)
    except Exception as error:  # peft raises many kinds for one bad setting
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"no adapter can be put on {type(model).__name__} with {origin}: {_one_line(error)}; linear layers found: "
            f"{_linear_names(model)}"
        ) from None
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ModelError(f"{type(model).__name__} has no linear layers to put a LoRA adapter on")
    return adapted


def _expressions(lora: LoraConfig) -> list[str]:
    """The settings that `peft` takes for regular expressions, as it completes them."""
    named = [value for value in (lora.target_modules, lora.exclude_modules) if isinstance(value, str)]
    keys = [key for key in (*(lora.rank_pattern or ()), *(lora.alpha_pattern or ())) if repeats(key)]
    return named + [rf"(.*\.)?({key})" for key in keys]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the names that files use: the model's own, of an adapter without the adapter's name."""
    return {
        _ADAPTER_NAME.sub(r".\1.weight", name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def pad_id(model: Any) -> int:
    """A token to pad with, one that the model's embedding has: nobody looks at it, so that any will do."""
    found = getattr(model.config, "pad_token_id", None)
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(found, int) or found < 0 or (weight is not None and found >= len(weight)):
        return 0
    return found


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (FSDP, DDP, compilation, `peft`) and the adapter's name add to it."""
    parts = [part for part in _ADAPTER_NAME.sub(r".\1.weight", name).split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts[2:] if parts[:2] == ["base_model", "model"] else parts)


def _source(config: ModelSection) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments for `from_pretrained`."""
    path = Path(config.path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.path '{config.path}': no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.path '{config.path}': the folder holds no config.json")
        return config.path, {"local_files_only": True}
    if path.is_file():
        raise ModelError(
            f"model.path '{config.path}': a file, but no GGUF file; give a folder, a GGUF file or a hub id"
        )
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if looks_local or not config.path:
        found = "" if path.is_absolute() else f" ({path.absolute()}, as paths go from the folder the command runs in)"
        raise ModelError(f"model.path '{config.path}': no such folder{found}; give a folder, a GGUF file or a hub id")
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    if not hub_can_be_asked():
        options["local_files_only"] = True  # what the hub's cache holds is used; the rest fails at once
    return config.path, options


def _why(config: ModelSection, options: dict[str, Any], error: BaseException) -> str:
    """The reason in one line; for a hub id without a hub, that."""
    if options.get("local_files_only") and not Path(config.path).exists():
        return "there is no such folder here, the hub cannot be reached, and its cache does not hold the model"
    if "trust_remote_code" in str(error):
        return (
            "its files come with Python code of their own, which is not run; if you trust who wrote it, set "
            "model.trust_remote_code: true"
        )
    return _one_line(error)


def _plain_copy(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not remember having been quantized (it refuses to be saved)."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def _linear_names(model: nn.Module) -> str:
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return ", ".join(sorted(names)) or "none"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
