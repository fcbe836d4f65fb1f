"""The kernels behind the ops: whether they can run here, how they are launched, which one `auto` picks."""
