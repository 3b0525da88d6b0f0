"""What is loaded: pretrained models, their parts, their quantization."""
