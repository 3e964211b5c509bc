"""An emulated ARM board: `rootfs` and `boot` build it, `machine` runs it; tools/arm_board is the command."""
