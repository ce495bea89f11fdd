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
    module.OP.name: module.OP
    for module in (
        layernorm_modulate,
        gate_residual_layernorm_modulate,
        qk_norm_rope,
        attention,
        lora_linear,
        gelu,
        rmsnorm,
        gate_residual,
        adamw,
        flow_loss,
    )
}
