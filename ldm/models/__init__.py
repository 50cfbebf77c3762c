"""Networks: the U-Net, the autoencoder, and the layers they share. Parameter names are the diffusers names."""
