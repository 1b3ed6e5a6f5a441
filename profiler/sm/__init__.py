"""SM-partition ranks: one GPU as many ranks, each on SMs of its own, recorded once and replayed.

All ranks live in one process and share the weights. What a rank computes is recorded as CUDA graphs, cut
wherever it meets a link, so that a prefill costs two launches a layer and rank. With eager launches, eight
ranks would wait for the host and not for each other. What happens between graphs (events, copies from one
rank's rows to another's, holding a link to its bandwidth) is ordinary stream work that a single thread
enqueues. One graph over all ranks would not do: it runs on the SMs of one rank.
"""
