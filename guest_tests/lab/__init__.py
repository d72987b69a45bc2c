"""The lab: fetches QEMU and Debian kernels, builds an initramfs, boots, asks the guest."""
