// Gives the shared precompiled header (torch/torch.h) a target to live in.
