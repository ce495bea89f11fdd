export HF_HOME=/cache
DIT=/models/anima.safetensors
CUDA_VISIBLE_DEVICES=1 python -m accelerate.commands.launch --config_file acc.yaml --multi_gpu \
  --num_processes=4 anima_train.py \
  --pretrained_model_name_or_path=${DIT} --qwen3 /models/qwen3 --vae /models/vae.safetensors \
  --dataset_config /data/d.toml --output_dir /out --output_name full \
  --learning_rate 1e-5 --self_attn_lr 5e-6 --mlp_lr 0 --llm_adapter_lr 0 \
  --optimizer_type AdaFactor \
  --optimizer_args relative_step=False scale_parameter=False warmup_init=False \
  --full_bf16 --mixed_precision bf16 --fused_backward_pass --gradient_checkpointing \
  --blocks_to_swap 10 --max_train_epochs 4 --save_every_n_steps 500 --network_dim 16 \
  --attn_mode torch --deepspeed --zero_stage 2 | tee train.log
