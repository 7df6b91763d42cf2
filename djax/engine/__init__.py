"""Requests in, generations out: options, prompts, tokenizer, the jitted program, results."""
