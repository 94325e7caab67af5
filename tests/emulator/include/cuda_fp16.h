// Stands in for CUDA's header of this name: the emulator defines what kernels use of it.
