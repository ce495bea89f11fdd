"""Full fine-tuning: training the weights of the model themselves."""
