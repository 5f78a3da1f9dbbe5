"""Generation: paged KV cache, chunked prefill, sampling, decoding."""
