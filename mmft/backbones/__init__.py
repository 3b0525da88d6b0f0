"""What is loaded: pretrained models, their parts, their quantization."""

from mmft.backbones.late import load_bitsandbytes

load_bitsandbytes()  # before anything of peft is imported, which imports it otherwise
