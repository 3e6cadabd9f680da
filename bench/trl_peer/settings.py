"""What both comparisons ask of GRPOTrainer, in its own terms: fp32 on a CPU, and quiet."""

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "model_init_kwargs": {"dtype": "float32"},
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
