local second = 2
