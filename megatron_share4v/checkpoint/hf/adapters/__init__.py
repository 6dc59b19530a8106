"""PEFT adapters, merged into their base model on import."""
