"""Step times of AdamP and SGDP beside torch's and other libraries' optimizers. See README.md."""
