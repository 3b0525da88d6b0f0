"""What is trained: adapters on named parts, and how they are stored."""
