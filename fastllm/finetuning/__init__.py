"""Fine-tuning of models of transformers on datasets: the library behind the command."""
