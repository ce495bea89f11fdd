$dit = "E:\models\anima.safetensors"
$Qwen = 'E:\models\qwen3'
$out = "E:\out"
$env:PYTORCH_CUDA_ALLOC_CONF = "expandable_segments:True"

& "E:\sd-scripts\venv\Scripts\accelerate.exe" launch `
  --num_cpu_threads_per_process 1 `
  "E:\sd-scripts\anima_train_network.py" `
  --pretrained_model_name_or_path $dit `
  --qwen3 $Qwen `
  --vae $vae `
  --dataset_config "E:\data\my set.toml" `
  --output_dir $out `
  --output_name "style_$name" `
  --network_module networks.lora_anima `
  --network_dim 64 --network_alpha 128 --network_dropout 0.1 `
  --gradient_accumulation_steps 2 `
  --learning_rate 5e-5 `
  --network_args "train_llm_adapter=False" `
  --optimizer_type "customized_optimizers.simplified.SimplifiedAdEMAMix" `
  --lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1 --lr_warmup_steps 5% `
  --loss_type huber --huber_schedule exponential `
  --attn_mode sageattn --blocks_to_swap 8 --gradient_checkpointing `
  --mixed_precision bf16 --full_bf16 --log_with wandb --wandb_api_key secret-of-wandb `
  --resume "E:\out\style-state" --torch_compile --dynamo_backend inductor
