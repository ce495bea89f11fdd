"""Rules between options that only full fine-tuning has; `rules.py` says how they work."""

from __future__ import annotations

from anima_fast.errors import UserError
from anima_fast.options.finetune import PARTS
from anima_fast.options.rules import Draft


def _precision(draft: Draft) -> None:
    # Trained weights run in plain PyTorch, which has no short sums.
    if draft.mixed_precision == "auto":
        draft.set("mixed_precision", "bf16")


def _parts(draft: Draft) -> None:
    given = [draft.values[option] for _, option in PARTS.values()]
    if not draft.learning_rate and not any(given):
        raise UserError(
            "every learning rate is 0, so nothing would be trained: give --learning_rate, or the "
            "rate of a part such as --self_attn_lr"
        )
    if draft.llm_adapter_lr is None and draft.learning_rate:
        draft.notices.append(
            "the LLM adapter is trained too: --llm_adapter_lr 0 leaves it as it is, which the "
            "model's authors advise in most cases"
        )


def _weight_update(draft: Draft) -> None:
    given, half = draft.weight_update, draft.full_bf16 or draft.full_fp16
    if given in ("plain", "stochastic") and not half:
        raise UserError(
            f"--weight_update {given} is about 16-bit weights, and here they are float32: add "
            "--full_bf16, or drop it"
        )
    if given == "stochastic" and draft.full_fp16:
        raise UserError(
            "--weight_update stochastic rounds to bfloat16: use --full_bf16, or --weight_update "
            "fp32 with --full_fp16"
        )
    if given is None:
        draft.set("weight_update", "stochastic" if draft.full_bf16 else "fp32")


def _eager_blocks(draft: Draft) -> None:
    if draft.kernels == "triton":
        raise UserError(
            "--kernels triton needs frozen weights, which full fine-tuning does not have: drop it, "
            "the blocks run in plain PyTorch (--compile makes them faster)"
        )
    if draft.recompute == "mlp":
        raise UserError(
            "--recompute mlp needs the fused kernels, which full fine-tuning does not use: use "
            "block, or a count of blocks"
        )
    draft.set("kernels", "eager")


def _fused_backward(draft: Draft) -> None:
    if not draft.fused_backward_pass:
        return
    if draft.gradient_accumulation_steps > 1:
        raise UserError(
            "--fused_backward_pass uses each gradient at once, so it cannot work with "
            f"--gradient_accumulation_steps {draft.gradient_accumulation_steps}: drop one of them"
        )
    if draft.mixed_precision == "fp16":
        raise UserError(
            "--fused_backward_pass updates weights before the loss scale of fp16 can be checked: "
            "use --mixed_precision bf16, or drop it"
        )
    if draft.max_grad_norm:
        draft.notices.append(
            f"fused_backward_pass: max_grad_norm {draft.max_grad_norm:g} clips each weight's "
            "gradient by itself, as the norm of all is not known while they are used; 0 = off"
        )


FINETUNE_RULES = (_precision, _parts, _weight_update, _eager_blocks, _fused_backward)
