"""Real kernels against viommu: the lab that boots them, the programs inside, the tests."""
