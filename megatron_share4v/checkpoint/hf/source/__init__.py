"""What is found in a Hugging Face directory or hub cache: weights, tower, template and tokenizer rule."""
