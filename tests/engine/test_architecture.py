from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from serve.engine.architecture import adopt
from serve.errors import UnsupportedArchitecture
from tests.engine.conftest import VOCABULARY, Desk, greedy, tiny_llama

Desks = Callable[..., Desk]

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": 258,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48, "bos_token_id": 256}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
SLIDING = {"head_dim": 8, "sliding_window": 8}
SHORT = {"rope_theta": 1e4, "original_max_position_embeddings": 24}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, dynamic ntk": (
        "Llama",
        {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2, some layers slide": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2, soft caps": ("Gemma2", SLIDING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3",
        SLIDING | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral, window shorter than the text": ("Mistral", SLIDING),
    "gpt2": ("GPT2", GPT),
    "gpt2, scaled by layer": ("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "phi3, longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": SHORT
            | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "head_dim": 8}),
    "qwen2 moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 24}),
    "gpt-oss, sinks": ("GptOss", SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek v3, latent attention": (
        "DeepseekV3",
        MOE
        | LATENT
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "cohere, scaled logits": ("Cohere", {}),
    "granite, four multipliers": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gpt-j": ("GPTJ", GPT | {"rotary_dim": 4}),
    "mamba": ("Mamba", {}),
    "recurrent gemma": (
        "RecurrentGemma",
        {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "attention_window_size": 16},
    ),
    "jamba": (
        "Jamba",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "falcon h1": ("FalconH1", {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "lfm2, short convolutions": ("Lfm2", {"full_attn_idxs": [1]}),
    "llama4, chunked attention": (
        "Llama4",
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 48},
    ),
}


def build(family: str, changes: dict[str, Any]) -> Any:
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = config_class(**(TINY | changes))
    torch.manual_seed(1)
    model_class = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel")
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(("family", "changes"), SERVED.values(), ids=SERVED.keys())
def test_greedy_equals_generate_in_batches_chunks_and_after_preemption(
    desks: Desks, family: str, changes: dict[str, Any]
) -> None:
    model = build(family, changes)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [27, 18, 28, 45], list(range(40, 70))]
    # Where a text outgrows LongRoPE's short form, transformers 5.19 drops its cache but feeds only the newest token:
    # there, what `generate` says without a cache is the model's answer.
    expected = [greedy(model, prompt, 24, use_cache="longrope" not in str(changes)) for prompt in prompts]
    roomy = desks(model, max_num_seqs=4, max_num_batched_tokens=11, max_prefill_tokens_beside_decode=5, block_size=4)
    answers = roomy.wait(*[roomy.submit(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts])
    assert [answer.tokens() for answer in answers] == expected
    assert roomy.engine.stats().preemptions == 0
    roomy.engine.close()

    bytes_per_block = roomy.engine.stats().kv_cache_bytes // (roomy.engine.stats().kv_blocks_total + 1)
    cramped = desks(model, block_size=4, max_model_len=56, kv_cache_bytes=15 * bytes_per_block)
    answers = cramped.wait(*[cramped.submit(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts])
    assert [answer.tokens() for answer in answers] == expected
    assert cramped.engine.stats().preemptions > 0
    assert len(set(expected[0])) > 2, "a text of one token proves little"


@pytest.mark.parametrize(("family", "changes"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_served_wrong_is_refused_by_name(family: str, changes: dict[str, Any]) -> None:
    model = build(family, changes)
    with pytest.raises(UnsupportedArchitecture, match=type(model).__name__):
        adopt(model)


def test_a_model_that_mixes_tokens_beside_attention_is_refused_by_the_probe() -> None:
    model = tiny_llama()
    plain = model.model.layers[0].mlp.forward

    def shifted(x: Tensor) -> Tensor:
        return plain(x) + x.roll(1, dims=1)  # a state that is no key and no value

    model.model.layers[0].mlp.forward = shifted
    with pytest.raises(UnsupportedArchitecture, match="probe"):
        adopt(model)


def test_a_refused_model_keeps_its_own_attention() -> None:
    model = build("Bloom", {"n_layer": 2, "n_head": 4})
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedArchitecture):
        adopt(model)
    assert model.config._attn_implementation == before
