"""`python -m polar_ray`, the same as `polar-ray`."""

from polar_ray.cli.main import main

if __name__ == "__main__":
    main()
