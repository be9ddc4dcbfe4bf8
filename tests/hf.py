"""Hugging Face's side of the comparisons in `parity.py`: transformers and PEFT, on torch."""

import functools
from typing import Any

import numpy as np
import parity
import peft
import torch
import transformers

from seal_jax import checkpoint
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other

VERSIONS = {lib.__name__: lib.__version__ for lib in (torch, transformers, peft)}
_KINDS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
}


def hf_config(config: ModelConfig, **changes: Any) -> transformers.PretrainedConfig:
    """Returns the same architecture as transformers describes it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", **config.rope_scaling._asdict()}
    settings = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.d_head,
        rms_norm_eps=config.rms_eps,
        tie_word_embeddings=config.tied,
        rope_parameters=rope,
        max_position_embeddings=config.max_positions,
        eos_token_id=list(config.eos_ids),
        bos_token_id=config.bos_id,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return _KINDS[config.family](**settings | changes)


def hf_model(params: Params) -> Any:
    """Returns the same model in torch, float32."""
    built = transformers.AutoModelForCausalLM.from_config(hf_config(params.config))
    state = {
        name: torch.from_numpy(np.array(tensor()))
        for name, tensor in checkpoint.named_tensors(params).items()
    }
    missing, unexpected = built.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    built.tie_weights()
    return built.float().eval()


def factors(wrapped: Any, target: str) -> list[tuple[Any, Any]]:
    """Returns the torch parameters (A, B) of a target in each layer."""
    layers = wrapped.base_model.model.model.layers
    home = "self_attn" if target in "qkvo" else "mlp"
    modules = [getattr(getattr(layer, home), f"{target}_proj") for layer in layers]
    return [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in modules]


def with_adapter(base: Any, adapter: Adapter) -> Any:
    """Returns a torch model wrapped in PEFT, with our adapter's numbers in it."""
    settings = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=round(adapter.scale * adapter.rank),
        target_modules=[f"{target}_proj" for target in adapter.a],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for target in adapter.a:
            for layer, (a, b) in enumerate(factors(wrapped, target)):
                a.copy_(torch.from_numpy(np.array(adapter.a[target][layer]).T))
                b.copy_(torch.from_numpy(np.array(adapter.b[target][layer]).T))
    return wrapped.eval()


def arguments(given: parity.Inputs) -> dict[str, torch.Tensor]:
    """Returns what a forward pass needs: texts of a row see themselves alone, from position 0."""
    segments = given.segments
    t = segments.shape[1]
    seen = segments[:, :, None] == segments[:, None, :]
    seen &= np.tril(np.ones((t, t), bool))
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)[:, None]
    positions = np.zeros_like(segments)
    for row, own in zip(positions, segments, strict=True):
        for number in np.unique(own):
            row[own == number] = np.arange((own == number).sum())
    return dict(
        input_ids=torch.from_numpy(given.tokens).long(),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions).long(),
    )


@functools.cache
def theirs(name: str) -> dict[str, np.ndarray]:
    """Returns what `parity.ours` does, computed by transformers and PEFT."""
    params, adapter = parity.weights(name)
    given = parity.inputs(name)
    base = hf_model(params)
    found: dict[str, np.ndarray] = {}
    if name in parity.GENERATING:
        found |= _greedy(base, given, "greedy bare")
    wrapped = with_adapter(base, adapter)
    out = wrapped(**arguments(given), labels=torch.from_numpy(given.labels).long())
    out.loss.backward()
    found["logits"] = out.logits.detach().numpy()
    found["loss"] = out.loss.detach().numpy()
    for at, part in enumerate("ab"):
        for target in adapter.a:
            grads = [pair[at].grad.numpy().T for pair in factors(wrapped, target)]
            found[f"gradient {part} {target}"] = np.stack(grads)
    if name in parity.GENERATING:
        found |= _greedy(wrapped, given, "greedy adapted")
    return found


def _greedy(model: Any, given: parity.Inputs, label: str) -> dict[str, np.ndarray]:
    found = {}
    for i, prompt in enumerate(given.prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=parity.NEW_TOKENS,
            )
        new = out[0, len(prompt) :].numpy()
        ends = np.isin(new, _ends(model))
        found[f"{label} {i}"] = new[: int(np.argmax(ends))] if ends.any() else new
    return found


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Returns the distribution that transformers samples from, [..., v]."""
    warpers = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopPLogitsWarper(top_p),
        ]
    )
    flat = torch.from_numpy(np.array(logits, np.float32)).reshape(-1, logits.shape[-1])
    return torch.softmax(warpers(None, flat).double(), -1).numpy().reshape(logits.shape)


def two_token_chances() -> np.ndarray:
    """Returns the chance [v, v] of each two-token continuation."""
    lm, prompt = parity.two_tokens()
    base = hf_model(lm.params)
    v = lm.config.vocab_size
    with torch.no_grad():
        first = base(input_ids=torch.tensor([prompt])).logits[0, -1].numpy()
        rows = torch.tensor([[*prompt, token] for token in range(v)])
        second = base(input_ids=rows).logits[:, -1].numpy()
    one = nucleus(first, parity.TEMPERATURE, parity.TOP_P)
    return one[:, None] * nucleus(second, parity.TEMPERATURE, parity.TOP_P)
