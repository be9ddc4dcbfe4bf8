"""The other side: transformers and PEFT on torch, with our weights, as lean as they can be run."""

import gc
import importlib.util
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import machine
import ml_dtypes
import numpy as np

from seal_jax import checkpoint
from seal_jax.config import Inner, Lora
from seal_jax.lora import Adapter
from seal_jax.params import Params


def here() -> bool:
    """Returns whether torch, transformers and PEFT are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))


def device() -> str:
    """Returns torch's accelerator, if JAX runs on one too."""
    import torch

    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    return "cuda" if on_gpu else "cpu"


def free() -> None:
    """Gives the accelerator's memory that torch no longer needs back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def model(params: Params) -> Any:
    """Returns the same model in torch, with all cores and the attention it chooses itself."""
    import torch
    import transformers

    torch.set_num_threads(machine.cores())
    c = params.config
    settings = transformers.Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.rms_eps,
        tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=32768,
        eos_token_id=list(c.eos_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    kind = torch.bfloat16 if params.embed.dtype == ml_dtypes.bfloat16 else torch.float32
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(settings)
    built = built.to_empty(device="cpu").to(kind)
    state = {name: _tensor(make()) for name, make in checkpoint.named_tensors(params).items()}
    missing, unexpected = built.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    built.tie_weights()
    _rotary(built, settings)
    return built.to(device())


def _rotary(built: Any, settings: Any) -> None:
    """Makes the rotary buffers, which no file holds, anew: on the meta device they have no data."""
    old = built.model.rotary_emb
    built.model.rotary_emb = type(old)(config=settings)


def _tensor(value: Any) -> Any:
    import torch

    value = np.array(value)
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


class Trained(NamedTuple):
    """Of one candidate: the loss of each step, and the seconds it took."""

    losses: list[float]
    seconds: float


def adapted(base: Any, settings: Lora) -> Any:
    """Returns the model with a PEFT adapter; it is made once and its numbers set anew."""
    import peft

    wanted = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=[f"{target}_proj" for target in settings.targets],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, wanted)


def set_adapter(wrapped: Any, adapter: Adapter) -> None:
    """Puts our adapter's numbers into PEFT's."""
    import torch

    layers = wrapped.base_model.model.model.layers
    with torch.no_grad():
        for target in adapter.a:
            home = "self_attn" if target in "qkvo" else "mlp"
            for at, layer in enumerate(layers):
                part = getattr(getattr(layer, home), f"{target}_proj")
                a, b = (np.array(x[target][at]).T for x in (adapter.a, adapter.b))
                part.lora_A["default"].weight.copy_(torch.from_numpy(a))
                part.lora_B["default"].weight.copy_(torch.from_numpy(b))


def train(
    wrapped: Any,
    texts: Sequence[np.ndarray],
    settings: Inner,
    *,
    pad_to: int = 0,
    pad_id: int = 0,
    total: int = 0,
) -> Trained:
    """Returns the losses of one candidate trained on texts, one a step, in the order given.

    The same arithmetic as transformers' Trainer (AdamW, linear decay, clipping), without its
    logging, callbacks and data loader.

    Args:
      pad_to: Pad each text to this length and train on the padding, as the reference does.
      total: Steps of the schedule, where only the first of them are run.
    """
    import torch

    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    total = total or len(texts)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    losses = []
    place = next(wrapped.parameters()).device
    start = time.perf_counter()
    for text in texts:
        if pad_to:
            text = np.pad(text, (0, max(0, pad_to - len(text))), constant_values=pad_id)
        ids = torch.from_numpy(text[None].astype(np.int64)).to(place)
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        fall.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = [float(x) for x in losses]  # waits for the device
    return Trained(losses, time.perf_counter() - start)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Returns the new tokens [rows, m] of a batch padded on the left, and the seconds it took."""
    import torch

    model.eval()
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    how = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            num_return_sequences=samples,
            top_k=0 if temperature else None,
            **how,
        )
    found = out[:, longest:].cpu().numpy()
    return found, time.perf_counter() - start
