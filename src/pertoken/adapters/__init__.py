"""A method out into other libraries: TRL's and verl's trainers."""
