"""Retraining of pruned models: LoRA, continued pretraining, distillation from the dense model, one after the other.

`recipes` say what to do (rows of data), `instructions` and `examples` what to learn from. `loop.retrain` does it to a
model in memory, one `stage` after the other; `named` to a model by name, from folder to folder. `record` is what is
kept about it.
"""
