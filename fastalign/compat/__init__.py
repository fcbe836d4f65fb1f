"""Drop-ins with the names and signatures of other libraries; neither Liger Kernel nor TRL is imported."""
