"""The KL laboratory: ways of estimating a diffusion's bound and its gradient, measured side by side."""
