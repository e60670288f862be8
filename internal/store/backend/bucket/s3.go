package bucket

import (
	"context"
	"fmt"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"
	"gocloud.dev/blob/s3blob"

	"podstasis.dev/stasis/internal/store/backend"
)

// S3 is a bucket in S3, or in what speaks its protocol. Nothing is taken from the
// environment.
type S3 struct {
	Bucket, Prefix string
	Region         string // us-east-1 where a server has none
	Endpoint       string // the URL of a server that is not Amazon's
	PathStyle      bool   // the bucket in the path, not in the host name

	AccessKeyID, SecretAccessKey, SessionToken string

	HTTP *http.Client
}

// Open connects to nothing yet.
func (c S3) Open(ctx context.Context) (backend.Backend, error) {
	options := s3.Options{
		Region:                     c.Region,
		UsePathStyle:               c.PathStyle,
		HTTPClient:                 c.HTTP,
		RetryMaxAttempts:           3, // of a request; what lasts longer is the caller's
		Logger:                     logging.Nop{},
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenSupported,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken, Source: "Secret"}, nil
		}),
		DisableLogOutputChecksumValidationSkipped: true,
	}
	if c.Endpoint != "" {
		options.BaseEndpoint = aws.String(c.Endpoint)
	}
	b, err := s3blob.OpenBucket(ctx, s3.New(options), c.Bucket, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported})
	if err != nil {
		return nil, fmt.Errorf("S3: %w", err)
	}
	return &bucket{blob: b, prefix: c.Prefix, place: "bucket " + c.Bucket}, nil
}
