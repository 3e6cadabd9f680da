"""What the comparisons with TRL share; `step.py` and `demo.py` run in TRL's own virtual environment."""
