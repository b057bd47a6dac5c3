"""Featurization, datasets, CGCNN models, training and screening: pure science."""
