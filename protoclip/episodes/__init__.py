"""Episodes: stored features and a teacher's, and the prototypes made of them."""
