package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// state is what an application tells of itself: values by key, and a curve.
type state struct {
	values map[string]string
	curve  map[string]string // by point
}

// parse reads the lines KEY=VALUE that a probe prints. The key "wrong" is what
// the application itself found to be wrong.
func parse(text string) (state, error) {
	s := state{map[string]string{}, map[string]string{}}
	for line := range strings.Lines(text) {
		key, value, found := strings.Cut(strings.TrimSpace(line), "=")
		switch {
		case !found:
			return s, fmt.Errorf("the state has a line %q", line)
		case key == "wrong":
			return s, &wrongError{value}
		case key == "curve":
			at, value, _ := strings.Cut(value, " ")
			s.curve[at] = value
		default:
			s.values[key] = value
		}
	}
	return s, nil
}

// wrongError is what the application found to be wrong; asking again is no help.
type wrongError struct{ what string }

func (e *wrongError) Error() string { return e.what }

// lacks finds keys that a state does not have.
func (a *app) lacks(s state) error {
	var errs []error
	for _, key := range a.Same {
		if s.values[key] == "" {
			errs = append(errs, fmt.Errorf("the state has no %s", key))
		}
	}
	for _, key := range a.Grows {
		if _, err := strconv.ParseUint(s.values[key], 10, 64); err != nil {
			errs = append(errs, fmt.Errorf("%s is %q, not a number", key, s.values[key]))
		}
	}
	if a.Curve && len(s.curve) == 0 {
		errs = append(errs, errors.New("the curve has no points"))
	}
	return errors.Join(errs...)
}

// follows judges a state by an earlier one of the same processes.
func (a *app) follows(later, earlier state) error {
	var errs []error
	for _, key := range a.Same {
		if was, is := earlier.values[key], later.values[key]; is != was {
			errs = append(errs, fmt.Errorf("%s was %s and is %s", key, was, is))
		}
	}
	for _, key := range a.Grows {
		if was, is := number(earlier, key), number(later, key); is < was {
			errs = append(errs, fmt.Errorf("%s went back from %d to %d", key, was, is))
		}
	}
	for at, was := range earlier.curve {
		if is := later.curve[at]; is != was {
			errs = append(errs, fmt.Errorf("point %s of the curve was %s and is %q", at, was, is))
			break
		}
	}
	return errors.Join(errs...)
}

// stalled names what has not grown since an earlier state.
func (a *app) stalled(later, earlier state) error {
	var errs []error
	for _, key := range a.Grows {
		if number(later, key) <= number(earlier, key) {
			errs = append(errs, fmt.Errorf("%s stays at %s", key, later.values[key]))
		}
	}
	return errors.Join(errs...)
}

func number(s state, key string) uint64 {
	n, _ := strconv.ParseUint(s.values[key], 10, 64) // lacks has looked at it
	return n
}

// deviates compares a curve with that of an uninterrupted run, which must have
// come as far.
func deviates(curve, uninterrupted map[string]string) error {
	if len(uninterrupted) < len(curve) {
		return fmt.Errorf("the uninterrupted run has %d points yet, this one %d", len(uninterrupted), len(curve))
	}
	for at, is := range curve {
		if want := uninterrupted[at]; is != want {
			return &wrongError{fmt.Sprintf("point %s of the curve is %s, without interruption it is %q", at, is, want)}
		}
	}
	return nil
}
