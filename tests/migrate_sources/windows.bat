@echo off
REM training of Mia
setlocal
set "MODELS=D:\AI models\anima"
set CUDA_VISIBLE_DEVICES=0
call venv\Scripts\activate.bat
cd /d D:\sd-scripts
accelerate launch --mixed_precision bf16 --num_processes 2 --gpu_ids all anima_train_network.py ^
  --pretrained_model_name_or_path "%MODELS%\anima-base-v1.0.safetensors" ^
  --qwen3 "%MODELS%\qwen_3_06b_base.safetensors" --vae "%MODELS%\qwen_image_vae.safetensors" ^
  --train_data_dir "D:\training\mia\" --resolution 1024,1024 --enable_bucket ^
  --output_dir=D:\out\ --output_name mia_v1 --caption_extention .txt ^
  --network_module networks.lora_anima --network_dim 32 --network_alpha 16 ^
  --network_args "exclude_patterns=['.*mlp.*', 'blocks\.0\..*']" rank_dropout=0.1 ^
  --optimizer_args "weight_decay=0.01" "betas=0.9,0.99" --use_8bit_adam ^
  --unet_lr 1e-4 --text_encoder_lr 1e-5 --max_train_steps=2000 --seed 42 --xformers ^
  --mixed_precision bf16 --save_precision fp16 --keep_tokens_separator "|||" --fp8_base > log.txt 2>&1
pause
