"""C++ and CUDA sources, shipped as package data and compiled at first use."""
