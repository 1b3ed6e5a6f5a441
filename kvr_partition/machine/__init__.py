"""What a prefill costs on a machine: chunks, messages, who waits for whom, and the best split."""
