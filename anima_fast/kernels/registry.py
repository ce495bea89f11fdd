"""`OPS`, the only list of the operators: parity tests, compile checks, benchmarks and predictions
are made from it."""

from anima_fast.kernels import (
    adamw,
    attention,
    flow_loss,
    gate_residual,
    gate_residual_layernorm_modulate,
    gelu,
    layernorm_modulate,
    lora_linear,
    qk_norm_rope,
    rmsnorm,
)
from anima_fast.kernels.op import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        layernorm_modulate.OP,
        layernorm_modulate.POWERS,
        gate_residual_layernorm_modulate.OP,
        gate_residual_layernorm_modulate.POWERS,
        qk_norm_rope.OP,
        attention.OP,
        attention.SHORT,
        lora_linear.OP,
        lora_linear.SHORT,
        gelu.OP,
        rmsnorm.OP,
        gate_residual.OP,
        gate_residual.POWERS,
        adamw.OP,
        flow_loss.OP,
    )
}
