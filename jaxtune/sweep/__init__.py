"""`jaxtune sweep`: many trainings over one base, compared early, the best trained to the end."""
