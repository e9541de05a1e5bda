"""`jaxtune sweep`: many trainings over one frozen base, compared early, the best trained to the end."""
